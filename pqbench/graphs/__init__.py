"""A decode step captured once and replayed: CUDA graphs, and what stands for them where there is no GPU."""
