"""The ground of every room: results with their files, context, progress, optional packages, workers."""
