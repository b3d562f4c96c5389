"""What a run leaves behind: tables, figures, movies and logs."""
