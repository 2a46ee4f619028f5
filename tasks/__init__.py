"""Problems and right answers."""
