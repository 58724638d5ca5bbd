"""What models in the loop say of samples, and which of it is kept."""
