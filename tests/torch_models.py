"""The networks in PyTorch, with the parameter names of torchvision and of the authors.

Written from He et al. (2016) and Howard et al. (2019). Imported only where PyTorch is there.
Images are normalised outside, and there is no dropout.
"""

import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)  # Doctests import every module.
nn = torch.nn


def multiple_of_8(value):
    down = max(8, int(value + 4) // 8 * 8)
    return down if down >= 0.9 * value else down + 8


class ConvNorm(nn.Sequential):
    def __init__(self, inputs, outputs, size, activation, stride=1, groups=1):
        super().__init__(
            nn.Conv2d(inputs, outputs, size, stride, (size - 1) // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=0.001, momentum=0.01), *activation)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        squeezed = multiple_of_8(channels // 4)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        scale = torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * nn.functional.hardsigmoid(self.fc2(scale))


class InvertedResidual(nn.Module):
    def __init__(self, inputs, expanded, outputs, size, stride, squeeze, activation):
        super().__init__()
        layers = [ConvNorm(inputs, expanded, 1, [activation()])] if expanded != inputs else []
        layers.append(ConvNorm(expanded, expanded, size, [activation()], stride, expanded))
        layers += [SqueezeExcitation(expanded)] if squeeze else []
        layers.append(ConvNorm(expanded, outputs, 1, []))
        self.block = nn.Sequential(*layers)
        self.added = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.block(x) if self.added else self.block(x)


# Expanded and outgoing channels, kernel, stride, squeeze-and-excitation, hard-swish.
MOBILENET = {
    "small": """16 16 3 2 SE RE | 72 24 3 2 -- RE | 88 24 3 1 -- RE | 96 40 5 2 SE HS |
                240 40 5 1 SE HS | 240 40 5 1 SE HS | 120 48 5 1 SE HS | 144 48 5 1 SE HS |
                288 96 5 2 SE HS | 576 96 5 1 SE HS | 576 96 5 1 SE HS""",
    "large": """16 16 3 1 -- RE | 64 24 3 2 -- RE | 72 24 3 1 -- RE | 72 40 5 2 SE RE |
                120 40 5 1 SE RE | 120 40 5 1 SE RE | 240 80 3 2 -- HS | 200 80 3 1 -- HS |
                184 80 3 1 -- HS | 184 80 3 1 -- HS | 480 112 3 1 SE HS | 672 112 3 1 SE HS |
                672 160 5 2 SE HS | 960 160 5 1 SE HS | 960 160 5 1 SE HS""",
}


class MobileNetV3(nn.Module):
    """``width_mult`` as torchvision's, but for the feature layer, whose size is given."""

    def __init__(self, variant, *, width_mult, num_features, num_classes, channels=3):
        super().__init__()
        inputs = multiple_of_8(16 * width_mult)
        layers = [ConvNorm(channels, inputs, 3, [nn.Hardswish()], 2)]
        for row in MOBILENET[variant].split("|"):
            *numbers, squeeze, activation = row.split()
            expanded, outputs, size, stride = map(int, numbers)
            expanded, outputs = (multiple_of_8(n * width_mult) for n in (expanded, outputs))
            layers.append(InvertedResidual(
                inputs, expanded, outputs, size, stride, squeeze == "SE",
                {"RE": nn.ReLU, "HS": nn.Hardswish}[activation]))
            inputs = outputs
        layers.append(ConvNorm(inputs, 6 * inputs, 1, [nn.Hardswish()]))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(6 * inputs, num_features), nn.Hardswish(), nn.Identity(),
            nn.Linear(num_features, num_classes))

    def forward(self, images):
        features = self.classifier[1](self.classifier[0](self.features(images).mean((2, 3))))
        return self.classifier[3](features), features


class BasicBlock(nn.Module):
    def __init__(self, inputs, channels, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.projection = None
        if stride != 1 or inputs != channels:
            self.projection = shortcut
            self.add_module(shortcut, nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (self.get_submodule(self.projection)(x) if self.projection else x))


class ResNet18(nn.Module):
    """torchvision's with ``stem="imagenet"``, the authors' with ``stem="cifar"``.

    Args:
      stem: as above; it also names the shortcuts.
      num_features: of the feature layer, ``fc_layer.1``; None for torchvision's ``fc`` alone.
    """

    def __init__(self, stem, *, width, num_features, num_classes, channels=3):
        super().__init__()
        self.large = stem == "imagenet"
        size, stride = (7, 2) if self.large else (3, 1)
        self.conv1 = nn.Conv2d(channels, width, size, stride, size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage in range(4):
            blocks = []
            for index in range(2):
                channels, stride = width * 2**stage, 2 if stage and not index else 1
                blocks.append(BasicBlock(
                    inputs, channels, stride, "downsample" if self.large else "shortcut"))
                inputs = channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        if num_features is None:
            self.fc = nn.Linear(inputs, num_classes)
        else:
            self.fc_layer = nn.Sequential(
                nn.ReLU(), nn.Linear(inputs, num_features), nn.Linear(num_features, num_classes))

    def forward(self, images):
        x = torch.relu(self.bn1(self.conv1(images)))
        if self.large:
            x = nn.functional.max_pool2d(x, 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))
        features = self.fc_layer[1](self.fc_layer[0](x))
        return self.fc_layer[2](features), features
