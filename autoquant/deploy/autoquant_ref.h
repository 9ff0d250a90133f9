/* Portable reference kernels with the arithmetic and data layout of CMSIS-NN's s8 kernels.

   Activations are int8 in HWC order, weights int8 in OHWI order (HWO for depthwise ones), biases
   int32. real = (q - zero_point) * scale; input_offset is minus the zero point of the input,
   output_offset the zero point of the output; acc * scale is multiplier * 2^(shift - 31). Each
   function names the CMSIS-NN kernel that takes the same arrays. */
#ifndef AUTOQUANT_REF_H
#define AUTOQUANT_REF_H

#include <stdint.h>

typedef struct {
    int32_t in_h, in_w, in_c, out_h, out_w, out_c;
    int32_t k_h, k_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
    int32_t input_offset, output_offset, act_min, act_max;
} aq_window;

static inline int32_t aq_clamp(int32_t value, int32_t low, int32_t high)
{
    return value < low ? low : value > high ? high : value;
}

/* arm_nn_requantize: doubling high multiplication, then a rounding division by a power of two */
static inline int32_t aq_requantize(int32_t value, int32_t multiplier, int32_t shift)
{
    const int32_t left = shift > 0 ? shift : 0, right = shift > 0 ? 0 : -shift;
    const int64_t product = (int64_t)value * ((int64_t)1 << left) * multiplier;
    const int32_t high = (int32_t)((product + ((int64_t)1 << 30)) >> 31);
    if (right == 0)
        return high;
    if (right > 31)
        return 0;
    const int64_t mask = ((int64_t)1 << right) - 1, remainder = high & mask;
    const int64_t threshold = (mask >> 1) + (high < 0);
    return (int32_t)((int64_t)high >> right) + (remainder > threshold);
}

/* arm_convolve_s8 (with groups: the weights hold in_c / groups inputs) */
static inline void aq_convolve_s8(const aq_window *p, const int32_t *multiplier,
                                  const int32_t *shift, const int8_t *input,
                                  const int8_t *weight, const int32_t *bias, int8_t *output)
{
    const int32_t inputs = p->in_c / p->groups, outputs = p->out_c / p->groups;
    for (int32_t y = 0; y < p->out_h; y++)
        for (int32_t x = 0; x < p->out_w; x++)
            for (int32_t o = 0; o < p->out_c; o++) {
                int32_t acc = bias[o];
                const int32_t first = o / outputs * inputs;
                for (int32_t i = 0; i < p->k_h; i++)
                    for (int32_t j = 0; j < p->k_w; j++) {
                        const int32_t row = y * p->stride_h - p->pad_h + i * p->dilation_h;
                        const int32_t col = x * p->stride_w - p->pad_w + j * p->dilation_w;
                        if (row < 0 || row >= p->in_h || col < 0 || col >= p->in_w)
                            continue;
                        const int8_t *at = input + (row * p->in_w + col) * p->in_c + first;
                        const int8_t *w = weight + ((o * p->k_h + i) * p->k_w + j) * inputs;
                        for (int32_t c = 0; c < inputs; c++)
                            acc += (at[c] + p->input_offset) * w[c];
                    }
                acc = aq_requantize(acc, multiplier[o], shift[o]) + p->output_offset;
                output[(y * p->out_w + x) * p->out_c + o] =
                    (int8_t)aq_clamp(acc, p->act_min, p->act_max);
            }
}

/* arm_depthwise_conv_s8 (ch_mult is out_c / in_c) */
static inline void aq_depthwise_conv_s8(const aq_window *p, const int32_t *multiplier,
                                        const int32_t *shift, const int8_t *input,
                                        const int8_t *weight, const int32_t *bias, int8_t *output)
{
    const int32_t ch_mult = p->out_c / p->in_c;
    for (int32_t y = 0; y < p->out_h; y++)
        for (int32_t x = 0; x < p->out_w; x++)
            for (int32_t o = 0; o < p->out_c; o++) {
                int32_t acc = bias[o];
                for (int32_t i = 0; i < p->k_h; i++)
                    for (int32_t j = 0; j < p->k_w; j++) {
                        const int32_t row = y * p->stride_h - p->pad_h + i * p->dilation_h;
                        const int32_t col = x * p->stride_w - p->pad_w + j * p->dilation_w;
                        if (row < 0 || row >= p->in_h || col < 0 || col >= p->in_w)
                            continue;
                        acc += (input[(row * p->in_w + col) * p->in_c + o / ch_mult] +
                                p->input_offset) *
                               weight[(i * p->k_w + j) * p->out_c + o];
                    }
                acc = aq_requantize(acc, multiplier[o], shift[o]) + p->output_offset;
                output[(y * p->out_w + x) * p->out_c + o] =
                    (int8_t)aq_clamp(acc, p->act_min, p->act_max);
            }
}

/* arm_fully_connected_per_channel_s8: in_c inputs, out_c outputs */
static inline void aq_fully_connected_s8(const aq_window *p, const int32_t *multiplier,
                                         const int32_t *shift, const int8_t *input,
                                         const int8_t *weight, const int32_t *bias, int8_t *output)
{
    for (int32_t o = 0; o < p->out_c; o++) {
        int32_t acc = bias[o];
        for (int32_t c = 0; c < p->in_c; c++)
            acc += (input[c] + p->input_offset) * weight[o * p->in_c + c];
        acc = aq_requantize(acc, multiplier[o], shift[o]) + p->output_offset;
        output[o] = (int8_t)aq_clamp(acc, p->act_min, p->act_max);
    }
}

/* the last layer of a network whose outputs are float: the accumulators as they are */
static inline void aq_fully_connected_s8_s32(const aq_window *p, const int8_t *input,
                                             const int8_t *weight, const int32_t *bias,
                                             int32_t *output)
{
    for (int32_t o = 0; o < p->out_c; o++) {
        output[o] = bias[o];
        for (int32_t c = 0; c < p->in_c; c++)
            output[o] += (input[c] + p->input_offset) * weight[o * p->in_c + c];
    }
}

/* arm_max_pool_s8 */
static inline void aq_max_pool_s8(const aq_window *p, const int8_t *input, int8_t *output)
{
    for (int32_t y = 0; y < p->out_h; y++)
        for (int32_t x = 0; x < p->out_w; x++)
            for (int32_t c = 0; c < p->out_c; c++) {
                int32_t best = -128;
                for (int32_t i = 0; i < p->k_h; i++)
                    for (int32_t j = 0; j < p->k_w; j++) {
                        const int32_t row = y * p->stride_h - p->pad_h + i * p->dilation_h;
                        const int32_t col = x * p->stride_w - p->pad_w + j * p->dilation_w;
                        if (row < 0 || row >= p->in_h || col < 0 || col >= p->in_w)
                            continue;
                        const int32_t value = input[(row * p->in_w + col) * p->in_c + c];
                        best = value > best ? value : best;
                    }
                output[(y * p->out_w + x) * p->out_c + c] =
                    (int8_t)aq_clamp(best, p->act_min, p->act_max);
            }
}

/* arm_avgpool_s8 keeps the scale of its input; this one requantizes the sum, without padding.
   It is arm_depthwise_conv_s8 with weights of 1. */
static inline void aq_avg_pool_s8(const aq_window *p, int32_t multiplier, int32_t shift,
                                  const int8_t *input, int8_t *output)
{
    for (int32_t y = 0; y < p->out_h; y++)
        for (int32_t x = 0; x < p->out_w; x++)
            for (int32_t c = 0; c < p->out_c; c++) {
                int32_t acc = 0;
                for (int32_t i = 0; i < p->k_h; i++)
                    for (int32_t j = 0; j < p->k_w; j++)
                        acc += input[((y * p->stride_h + i) * p->in_w + x * p->stride_w + j) *
                                         p->in_c + c] + p->input_offset;
                acc = aq_requantize(acc, multiplier, shift) + p->output_offset;
                output[(y * p->out_w + x) * p->out_c + c] =
                    (int8_t)aq_clamp(acc, p->act_min, p->act_max);
            }
}

/* arm_elementwise_add_s8 with left_shift 20 */
static inline void aq_elementwise_add_s8(const int8_t *first, int32_t first_offset,
                                         int32_t first_multiplier, int32_t first_shift,
                                         const int8_t *second, int32_t second_offset,
                                         int32_t second_multiplier, int32_t second_shift,
                                         int32_t output_offset, int32_t multiplier, int32_t shift,
                                         int32_t act_min, int32_t act_max, int32_t size,
                                         int8_t *output)
{
    for (int32_t i = 0; i < size; i++) {
        const int32_t a = (first[i] + first_offset) * (1 << 20);
        const int32_t b = (second[i] + second_offset) * (1 << 20);
        const int32_t sum = aq_requantize(a, first_multiplier, first_shift) +
                            aq_requantize(b, second_multiplier, second_shift);
        const int32_t value = aq_requantize(sum, multiplier, shift) + output_offset;
        output[i] = (int8_t)aq_clamp(value, act_min, act_max);
    }
}

/* another grid for the same values (no CMSIS-NN kernel) */
static inline void aq_requantize_s8(const int8_t *input, int32_t input_offset, int32_t multiplier,
                                    int32_t shift, int32_t output_offset, int32_t act_min,
                                    int32_t act_max, int32_t size, int8_t *output)
{
    for (int32_t i = 0; i < size; i++) {
        const int32_t value = aq_requantize((input[i] + input_offset) * (1 << 20), multiplier,
                                            shift - 20) + output_offset;
        output[i] = (int8_t)aq_clamp(value, act_min, act_max);
    }
}

#endif
