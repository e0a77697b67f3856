"""How an audit log lies on the disk: hashed frames in segments, notes that stand for segments, and their writer."""
