"""The workers of a run behind other processes: the same objects, spoken to by the same three verbs.

`spmd` needs nothing but torch: processes that this one starts, or that torchrun or srun has
started. `on_ray` needs Ray.
"""
