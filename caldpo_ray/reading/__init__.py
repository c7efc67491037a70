"""From files, object storage and hubs to examples: raw records, each with its place, and what becomes of it."""
