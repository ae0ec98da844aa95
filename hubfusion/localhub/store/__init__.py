"""What lies on disk: git repositories, LFS objects, and one SQLite file for everything else."""
