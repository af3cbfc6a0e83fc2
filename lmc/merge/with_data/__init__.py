"""Methods that look at examples: Fisher, RegMean, AdaMerging, soups, search."""
