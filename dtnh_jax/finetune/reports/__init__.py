"""Tables, figures, pages, exported networks and predictions of finished runs."""
