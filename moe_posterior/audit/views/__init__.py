"""What people see of an audit log: tables in a terminal, a page, a live view, plain files, and what these are computed from."""
