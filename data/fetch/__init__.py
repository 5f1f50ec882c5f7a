"""Pictures and videos: where they are fetched from, and how they are opened."""
