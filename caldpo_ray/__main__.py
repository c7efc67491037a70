"""`python -m caldpo_ray` is the command `caldpo`."""

from caldpo_ray.cli import main

main()
