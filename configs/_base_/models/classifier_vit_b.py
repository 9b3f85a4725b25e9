# ViT-B (87 M parameters) of "How to train your ViT", with the weights that timm has of it.
model = dict(
    type='gplq.plugins.fgvc.TimmClassifier',
    model_name='vit_base_patch16_224.augreg_in21k_ft_in1k',
    pretrained=True,
)
