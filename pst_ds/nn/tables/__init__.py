"""What takes the place of a model's tables of rows: of the embedding with an update, and of frozen ones in few bits."""
