"""What any long job needs: progress, whole files or none, work that continues, fingerprints, records, recipes, devices."""
