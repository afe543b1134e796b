"""What any long job needs: whole files or none, work that continues, fingerprints, records, recipes, devices."""
