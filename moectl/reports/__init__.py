"""How results look: terminal tables and figures."""
