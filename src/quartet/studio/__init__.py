"""The web app over run folders: reads files, imports no trainer."""
