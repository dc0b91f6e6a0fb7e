"""Pictures of runs: learning curves and dreams beside reality."""
