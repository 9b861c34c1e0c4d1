"""Tables of the paper: rows and columns as data, the runs they need, and the results beside the paper's."""
