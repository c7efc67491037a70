"""What people and other programs are shown: lines, metrics, figures, pages."""
