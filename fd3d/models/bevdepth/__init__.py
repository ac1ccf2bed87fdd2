"""BEVDepth (Li et al., AAAI 2023) as in BEVDet's first generation, with two frames."""
