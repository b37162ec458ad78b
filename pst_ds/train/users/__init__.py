"""Personal states over one sparse base: a store of them, their training user by user, evaluation, and exports."""
