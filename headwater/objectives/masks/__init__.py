"""What masked prediction hides, and how it asks for it: parts of `Masked`, and of whoever hides tokens."""
