"""From a module to the graph of its operators: by export, else by recording one run."""
