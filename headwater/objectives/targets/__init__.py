"""What masked prediction asks for at hidden places, and how the answers are scored: parts of `Masked`."""
