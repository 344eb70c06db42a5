"""Benchmarks: each file is a script with --help (`python -m benchmarks.encoder_cpu --help`)."""
