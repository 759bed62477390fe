"""What a run stands on: files, processes, checkpoints, reports."""
