# SPDX-License-Identifier: Apache-2.0
"""Training of the pocket model, stage by stage: judge, text encoders, VAE, UNet."""
