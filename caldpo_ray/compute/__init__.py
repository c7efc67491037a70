"""What a forward and a backward pass are made of, and what they cost."""
