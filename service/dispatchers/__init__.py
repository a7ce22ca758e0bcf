"""How attempts start: one file per place they run at. Start at base.py, the contract."""
