"""What every room stands on: results with their files, context, progress, optional packages, workers."""
