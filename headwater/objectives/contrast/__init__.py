"""What contrastive objectives compare, and what the comparison should look like: parts of `Contrastive`."""
