"""ResNet-18 on CIFAR-10 in bfloat16: augmentation on two loader processes, a one-cycle schedule.

python examples/resnet_cifar.py                       in this process, or a worker for each GPU
python examples/resnet_cifar.py --fake-data           no download, a few small batches: does it run here?
python examples/resnet_cifar.py --num-workers 4       four Ray workers
"""

import argparse
import os

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

import raylight

TO_TENSOR = [transforms.ToTensor(), transforms.Normalize(mean=0.47, std=0.25)]
AUGMENT = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]


class Images(raylight.DataModule):
    def __init__(self, path: str, fake: bool):
        super().__init__()
        self.path, self.fake, self.batch_size = path, fake, 4 if fake else 128

    def prepare_data(self):  # once on each node
        if not self.fake:
            datasets.CIFAR10(self.path, download=True)

    def dataset(self, train: bool):
        transform = transforms.Compose(AUGMENT + TO_TENSOR if train else TO_TENSOR)
        if self.fake:
            return datasets.FakeData(8, image_size=(3, 32, 32), num_classes=10, transform=transform)
        return datasets.CIFAR10(self.path, train=train, transform=transform)

    def train_dataloader(self):
        return DataLoader(self.dataset(train=True), self.batch_size, shuffle=True, num_workers=2, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.dataset(train=False), self.batch_size, num_workers=2)


class ResNet(raylight.Module):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = models.resnet18(num_classes=10)
        self.net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)  # images are small: no early stride
        self.net.maxpool = nn.Identity()
        self.net.to(memory_format=torch.channels_last)  # what tensor cores want, and bfloat16 on CPUs too

    def training_step(self, batch):
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels, label_smoothing=0.1)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch):
        images, labels = batch
        self.log("val_accuracy", (self.net(images).argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=5e-4)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


parser = argparse.ArgumentParser(description="Train ResNet-18 on CIFAR-10.")
parser.add_argument("--fake-data", action="store_true", help="random images, one short epoch")
parser.add_argument("--num-workers", type=int, default=argparse.SUPPRESS, help="Ray workers; 0: in this process")
if __name__ == "__main__":
    arguments = vars(parser.parse_args())
    fake = arguments.pop("fake_data")
    trainer = raylight.Trainer(name="cifar", precision="bf16-mixed", max_epochs=1 if fake else 30, **arguments)
    result = trainer.fit(ResNet(), datamodule=Images(os.path.abspath("data"), fake))
    print(f"Validation accuracy {result.metrics['val_accuracy']:.2%}, stored in {result.path}")
