// SPDX-License-Identifier: GPL-2.0
/*
 * The driver's peer in the benchmark: a driver of the same device, in C, in the
 * older design, where read() is no barrier. It has the same node and the same
 * calls, and only what a measurement needs: it does not validate the firmware,
 * does not handle an unbind while a process has a file open, and takes no
 * notification where the firmware is a device tree.
 */

#include <linux/acpi.h>
#include <linux/io.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/of.h>
#include <linux/platform_device.h>
#include <linux/poll.h>
#include <linux/random.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#define ID_SIZE 16

struct vmgenid {
	struct miscdevice misc;
	wait_queue_head_t wait;
	const __le32 *counter;
	phys_addr_t page;
	const u8 *id;
	u8 last_id[ID_SIZE];
};

struct open_file {
	struct vmgenid *vmgenid;
	u32 last;
};

static u32 counter(const struct vmgenid *vmgenid)
{
	return le32_to_cpu(READ_ONCE(*vmgenid->counter));
}

static int vmgenid_open(struct inode *inode, struct file *filp)
{
	struct vmgenid *vmgenid = container_of(filp->private_data, struct vmgenid, misc);
	struct open_file *file = kmalloc(sizeof(*file), GFP_KERNEL);

	if (!file)
		return -ENOMEM;
	file->vmgenid = vmgenid;
	file->last = counter(vmgenid);
	filp->private_data = file;
	return 0;
}

static int vmgenid_release(struct inode *inode, struct file *filp)
{
	kfree(filp->private_data);
	return 0;
}

static ssize_t vmgenid_read(struct file *filp, char __user *buf, size_t count, loff_t *pos)
{
	struct open_file *file = filp->private_data;
	u32 value;

	if (!count)
		return 0;
	if (count != sizeof(value) || *pos)
		return -EINVAL;
	value = counter(file->vmgenid);
	if (put_user(value, (u32 __user *)buf))
		return -EFAULT;
	file->last = value;
	return sizeof(value);
}

static __poll_t vmgenid_poll(struct file *filp, poll_table *wait)
{
	struct open_file *file = filp->private_data;

	poll_wait(filp, &file->vmgenid->wait, wait);
	return counter(file->vmgenid) == file->last ? 0 : EPOLLIN | EPOLLRDNORM;
}

static int vmgenid_mmap(struct file *filp, struct vm_area_struct *vma)
{
	struct open_file *file = filp->private_data;

	if (vma->vm_flags & (VM_WRITE | VM_EXEC))
		return -EPERM;
	vm_flags_clear(vma, VM_MAYWRITE | VM_MAYEXEC);
	return vm_iomap_memory(vma, file->vmgenid->page, PAGE_SIZE);
}

static const struct file_operations vmgenid_fops = {
	.owner = THIS_MODULE,
	.open = vmgenid_open,
	.release = vmgenid_release,
	.read = vmgenid_read,
	.poll = vmgenid_poll,
	.mmap = vmgenid_mmap,
	.llseek = noop_llseek,
};

static void vmgenid_notify(acpi_handle handle, u32 event, void *data)
{
	struct vmgenid *vmgenid = data;

	if (memcmp(vmgenid->last_id, vmgenid->id, ID_SIZE)) {
		memcpy(vmgenid->last_id, vmgenid->id, ID_SIZE);
		add_vmfork_randomness(vmgenid->last_id, ID_SIZE);
	}
	wake_up_interruptible(&vmgenid->wait);
}

static void *vmgenid_map_acpi(struct device *dev, char *name, size_t size, phys_addr_t *at)
{
	struct acpi_buffer parsed = { ACPI_ALLOCATE_BUFFER };
	union acpi_object *object;
	void *mapped = ERR_PTR(-EINVAL);

	if (ACPI_FAILURE(acpi_evaluate_object(ACPI_HANDLE(dev), name, NULL, &parsed)))
		return ERR_PTR(-ENODEV);
	object = parsed.pointer;
	if (object && object->type == ACPI_TYPE_PACKAGE && object->package.count == 2 &&
	    object->package.elements[0].type == ACPI_TYPE_INTEGER &&
	    object->package.elements[1].type == ACPI_TYPE_INTEGER) {
		*at = object->package.elements[0].integer.value |
		      object->package.elements[1].integer.value << 32;
		mapped = devm_memremap(dev, *at, size, MEMREMAP_WB);
	}
	ACPI_FREE(parsed.pointer);
	return mapped;
}

/* The ID is the first range, the counter the second. */
static void *vmgenid_map(struct platform_device *pdev, bool id, size_t size, phys_addr_t *at)
{
	struct resource *range;

	if (has_acpi_companion(&pdev->dev))
		return vmgenid_map_acpi(&pdev->dev, id ? "ADDR" : "CTRA", size, at);
	range = platform_get_resource(pdev, IORESOURCE_MEM, id ? 0 : 1);
	if (!range)
		return ERR_PTR(-ENODEV);
	*at = range->start;
	return devm_memremap(&pdev->dev, *at, size, MEMREMAP_WB);
}

static int vmgenid_probe(struct platform_device *pdev)
{
	struct device *dev = &pdev->dev;
	struct vmgenid *vmgenid;
	phys_addr_t at;

	vmgenid = devm_kzalloc(dev, sizeof(*vmgenid), GFP_KERNEL);
	if (!vmgenid)
		return -ENOMEM;
	init_waitqueue_head(&vmgenid->wait);

	vmgenid->id = vmgenid_map(pdev, true, ID_SIZE, &at);
	if (IS_ERR(vmgenid->id))
		return PTR_ERR(vmgenid->id);
	memcpy(vmgenid->last_id, vmgenid->id, ID_SIZE);
	add_device_randomness(vmgenid->last_id, ID_SIZE);

	vmgenid->counter = vmgenid_map(pdev, false, PAGE_SIZE, &vmgenid->page);
	if (IS_ERR(vmgenid->counter))
		return PTR_ERR(vmgenid->counter);

	if (has_acpi_companion(dev) &&
	    ACPI_FAILURE(acpi_install_notify_handler(ACPI_HANDLE(dev), ACPI_DEVICE_NOTIFY,
						     vmgenid_notify, vmgenid)))
		return -ENODEV;

	platform_set_drvdata(pdev, vmgenid);
	vmgenid->misc.minor = MISC_DYNAMIC_MINOR;
	vmgenid->misc.name = "vmgenid";
	vmgenid->misc.fops = &vmgenid_fops;
	vmgenid->misc.mode = 0444;
	return misc_register(&vmgenid->misc);
}

static void vmgenid_remove(struct platform_device *pdev)
{
	struct vmgenid *vmgenid = platform_get_drvdata(pdev);

	misc_deregister(&vmgenid->misc);
	if (has_acpi_companion(&pdev->dev))
		acpi_remove_notify_handler(ACPI_HANDLE(&pdev->dev), ACPI_DEVICE_NOTIFY, vmgenid_notify);
}

static const struct acpi_device_id vmgenid_ids[] = {
	{ "VMGENCTR", 0 },
	{ "VM_GEN_COUNTER", 0 },
	{ }
};
MODULE_DEVICE_TABLE(acpi, vmgenid_ids);

static const struct of_device_id vmgenid_of_ids[] = {
	{ .compatible = "microsoft,vmgenid" },
	{ }
};
MODULE_DEVICE_TABLE(of, vmgenid_of_ids);

static struct platform_driver vmgenid_driver = {
	.probe = vmgenid_probe,
	.remove = vmgenid_remove,
	.driver = {
		.name = "vmgenid_c",
		.acpi_match_table = vmgenid_ids,
		.of_match_table = vmgenid_of_ids,
	},
};
module_platform_driver(vmgenid_driver);

MODULE_DESCRIPTION("Virtual Machine Generation ID and counter, for comparison");
MODULE_AUTHOR("The vmgenid authors");
MODULE_LICENSE("GPL v2");
