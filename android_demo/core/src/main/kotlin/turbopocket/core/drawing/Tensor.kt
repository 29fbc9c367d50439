// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.drawing

/** Numbers of any type as float32, row by row, as the loop has them; a runtime gives its files what they take. */
class Tensor(val shape: IntArray, val values: FloatArray) {
    init {
        require(values.size == shape.fold(1, Int::times)) { "${values.size} numbers of shape ${shape.toList()}" }
    }

    companion object {
        /** [1, n]. */
        fun row(values: FloatArray) = Tensor(intArrayOf(1, values.size), values)
    }
}

/** Tensors of equal rows side by side along their last dimension. */
internal fun joined(tensors: List<Tensor>): Tensor {
    if (tensors.size == 1) return tensors[0]
    val leading = tensors[0].shape.dropLast(1)
    require(tensors.all { it.shape.dropLast(1) == leading }) { "tensors of ${tensors.map { it.shape.toList() }}" }
    val width = tensors.sumOf { it.shape.last() }
    val rows = leading.fold(1, Int::times)
    val values = FloatArray(rows * width)
    var column = 0
    for (tensor in tensors) {
        val own = tensor.shape.last()
        for (row in 0 until rows) tensor.values.copyInto(values, row * width + column, row * own, (row + 1) * own)
        column += own
    }
    return Tensor((leading + width).toIntArray(), values)
}
