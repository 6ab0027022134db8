"""Shared by all packages: training, metrics, checkpoints, files, devices and the command line."""
