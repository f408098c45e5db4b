"""Starting the workers of a run in other processes and on other machines.

`processes`, `follower`, `spmd` and `store` need nothing but torch: they serve processes that rank 0
starts, or that torchrun or srun has started. `on_ray` needs Ray. `start` chooses between them.
"""
