"""What a policy is made of: formats, casting, rules by path, and the table of primitives."""
