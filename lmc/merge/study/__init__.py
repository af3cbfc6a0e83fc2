"""Looking at models before and after they are merged: inspection, comparison, mixing by hand."""
