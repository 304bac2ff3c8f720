"""The networks in whose features generated images are measured; no metric lives here."""
