"""What tests and benchmarks share: problems, a sharded net and a reader of compiled programs.

Neither imports the other; both import this.
"""
