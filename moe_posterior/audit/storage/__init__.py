"""An audit log's files: hashed frames in segments, notes in place of old segments, and their writer."""
