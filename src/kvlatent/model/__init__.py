"""What a latent model is. The modelling file that every checkpoint carries is generated from this folder."""
