"""One module a kind of block: attention, MLPs, norms, and how a layer adds them to the residual stream."""
