"""What a config is made of: text, names, rules, and the options that are their own subject."""
