"""Time and bytes of a latent model beside its original, with plain and quantised caches."""
