"""An output that is continued night after night: what was, what is usual, and what a killed night left."""
