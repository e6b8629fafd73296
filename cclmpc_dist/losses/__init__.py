"""Loss terms as local sums and counts, and what the contrastive ones need."""
