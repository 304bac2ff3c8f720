"""Networks, one file per published architecture, and the weights shipped with the package."""
