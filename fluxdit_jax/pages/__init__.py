"""What the report pages share: their look, and their parts. A page is one file, without scripts."""
