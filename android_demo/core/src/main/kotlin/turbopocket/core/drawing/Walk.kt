// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.drawing

import turbopocket.core.artifact.Operand
import turbopocket.core.artifact.SamplerRow
import turbopocket.core.artifact.SamplerTable

/**
 * One walk by a manifest's sampler table, from noise to clean latents: at each row ask the denoiser, then [step].
 *
 * docs/manifest.md says what rows mean. [noise] gives fresh standard normal numbers, and is asked only for a step that
 * adds some.
 */
class Walk(private val table: SamplerTable, private val noise: (Int) -> FloatArray) {
    private var calls = 0
    private var first: FloatArray? = null
    private val remembered = ArrayDeque<FloatArray>()

    /** Latents of [count] numbers as the walk begins. */
    fun begin(count: Int): FloatArray = scaled(noise(count), table.initScale)

    /** What the denoiser is given for latents [x] at a row. */
    fun input(row: SamplerRow, x: FloatArray): FloatArray = scaled(x, row.inputScale)

    /** The latents after a row, of [x] and what the denoiser said. */
    fun step(row: SamplerRow, x: FloatArray, output: FloatArray): FloatArray {
        val step = row.steps[minOf(calls, row.steps.lastIndex)]
        if (calls == 0) first = x
        val operands = HashMap<Operand, FloatArray>()
        operands[Operand.X] = x
        operands[Operand.OUTPUT] = output
        first?.let { operands[Operand.FIRST] = it }
        remembered.forEachIndexed { age, values -> operands[REMEMBERED[age]] = values }
        row.estimate?.let { operands[Operand.ESTIMATE] = bounded(sum(it, operands)) }
        if (Operand.NOISE in step.next) operands[Operand.NOISE] = noise(x.size)
        val next = sum(step.next, operands)
        step.remember?.let {
            remembered.addFirst(sum(it, operands))
            if (remembered.size > REMEMBERED.size) remembered.removeLast()
        }
        calls += 1
        return next
    }

    private fun bounded(values: FloatArray): FloatArray {
        val bound = table.bound ?: return values
        return FloatArray(values.size) { values[it].coerceIn(-bound, bound) }
    }

    private fun sum(coefficients: Map<Operand, Float>, operands: Map<Operand, FloatArray>): FloatArray {
        val total = FloatArray(operands.getValue(Operand.X).size)
        for ((operand, coefficient) in coefficients) {
            val values = operands[operand] ?: continue
            for (index in total.indices) total[index] += coefficient * values[index]
        }
        return total
    }

    private fun scaled(values: FloatArray, factor: Float) = FloatArray(values.size) { values[it] * factor }

    private companion object {
        val REMEMBERED = listOf(Operand.REMEMBERED_1, Operand.REMEMBERED_2, Operand.REMEMBERED_3)
    }
}
